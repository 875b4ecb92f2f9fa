"""A merge in parts: the update of one tensor, the plan, its checks, the writing."""

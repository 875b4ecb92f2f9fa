"""The hot path: attention that keeps packed documents apart, loss on supervised positions only."""

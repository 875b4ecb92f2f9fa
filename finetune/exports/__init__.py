"""The layouts that `export` writes: one file for each, and what all of them read first.

Every folder is staged, hashed and published by one rename, with a model card in it.
"""

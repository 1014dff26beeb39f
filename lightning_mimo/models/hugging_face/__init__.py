"""Models of the Hugging Face hub as MimoModels: for each family what its config means, and the rules of its weights.

``registry`` finds the family of a config; ``decoder`` and ``vit`` hold what families share.
"""

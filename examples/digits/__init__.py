"""The digits demo: a small vision-language model that reads, adds up and compares handwritten digits."""

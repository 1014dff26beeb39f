"""A vision-language model of any size, as in LLaVA: images and text from files that are prepared once."""

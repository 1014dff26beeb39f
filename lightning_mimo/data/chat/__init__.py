"""Conversations as people keep them, made into samples by the processor of a model of ``transformers``.

From the outermost file to the innermost: ``datamodule``, ``dataset``, ``processor``, ``placeholders``, ``template``,
``media``, ``conversation``, ``rows``. Imports ``errors`` and Lightning; transformers, Pillow and the packages of file
formats where they are needed, because they are extras.
"""

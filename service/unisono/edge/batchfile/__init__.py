"""Batch files, as OpenAI and the command line write them: what every edge that reads and writes them shares."""

"""The stages: one file, one function, one command each. They wire records, backend and algorithm together."""

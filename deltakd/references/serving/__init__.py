"""References in another process: a server that holds the models, and trainers that ask it for hidden states."""

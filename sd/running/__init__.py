"""How networks are run, in speed and memory, from outside; the networks do not know."""

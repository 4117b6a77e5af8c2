"""Ways to and from other frameworks; nothing else of the package imports them, commands apart."""

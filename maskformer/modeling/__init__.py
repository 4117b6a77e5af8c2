"""The network and everything that trains it and reads its predictions."""

"""The bench: runs a stream of facts through an editing method, then asks for all of them."""

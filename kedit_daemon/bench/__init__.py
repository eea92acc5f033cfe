"""The honest measure: a stream of facts through an editing method, then all of them asked."""

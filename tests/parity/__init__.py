"""The promise, gradient for gradient: a plain oracle in float64, and the same training in any layout."""

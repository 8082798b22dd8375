"""Computations that no library has, each as a plain-torch function that runs anywhere."""

"""Mistakes that engines make, each as one stage computed otherwise, and executed to be proven."""

"""Puts one engine's dumps on trial: which stage is wrong, from its own inputs."""

"""Rollouts inside the trainer's process."""

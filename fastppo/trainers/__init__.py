"""Orchestration: PPO, supervised fine-tuning, reward models."""

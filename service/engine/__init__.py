"""Decides which rows run when, and runs them. No module here knows HTTP or asyncio."""

"""What runs, and when. Nothing here knows HTTP or asyncio."""

"""Networks and the structure of their attention. Nothing here knows about robots or losses."""

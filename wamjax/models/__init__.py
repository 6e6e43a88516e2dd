"""Contains the networks and the structure of their attention, independent of robots and losses."""

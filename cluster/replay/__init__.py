"""Replays gate traces in virtual time over the policies of the live expert memory."""

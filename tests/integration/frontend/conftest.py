"""Makes the front end's fixtures known here."""

from frontend_fixtures import *  # noqa: F403
from grpc_calls import run, serve  # noqa: F401

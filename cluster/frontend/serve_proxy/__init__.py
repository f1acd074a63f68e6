"""What Ray Serve's proxies need of us so that their own answers are ours."""

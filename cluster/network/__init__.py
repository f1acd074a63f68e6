"""Facts of connections that every transport shares: addresses, proof of a secret, what may stay unsent."""

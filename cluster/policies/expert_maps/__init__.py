"""Past requests' expert maps: stored, and searched by meaning and by trajectory."""

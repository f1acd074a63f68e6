"""One script for each foreign client: asks a server at argv[1] as its users do, raises when an answer is not right."""

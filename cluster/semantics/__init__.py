"""What a prompt means, as far as the choice of experts goes: its embedding, clusters of embeddings, what they use."""

"""What the server does around a strategy: rounds, screening of replies, what travels beside w."""

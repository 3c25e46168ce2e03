"""How the networks are trained: data drawn by code, losses, and a loop that resumes as if it had never stopped."""

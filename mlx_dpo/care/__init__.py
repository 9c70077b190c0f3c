"""What is dangerous to say or to leave unsaid to a person who cares for another."""

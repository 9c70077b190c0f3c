"""Answers weighed: measured, judged and compared so that a careful reader can believe the outcome."""

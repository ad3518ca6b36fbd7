"""The one training loop: parent, teachers, students and baselines differ by arguments."""

"""Parent to teachers, what each teacher says about every recording, and how good teachers are on others' speech."""

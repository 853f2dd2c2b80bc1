"""What is only fast, behind one door: the rule as C++ on a CPU."""

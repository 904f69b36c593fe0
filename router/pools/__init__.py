"""The replicas of each engine deployment: which there are, what each has cached, which one gets the next call."""

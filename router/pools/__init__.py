"""The replicas of each engine deployment: who is there, what each has cached, which one gets the next call."""

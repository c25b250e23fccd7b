// The namespace of the operators, once a process; head.cpp and group.cpp add theirs as fragments.
#include "arguments.h"

G2RL_LIBRARY(m) { (void)m; }

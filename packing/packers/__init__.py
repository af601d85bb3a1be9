"""Histogram -> plan. One packer a file, and what packers are made of.

table             PACKERS, and plan_packs, which checks every plan
spfhp  lpfhp      the paper's greedy packers
nnlshp            the paper's least squares
optimal           the default: the linear program, and a proof of how good the plan is
each              plans of many small histograms: the cells of cohorts
open_packs        packs that still have room, for best and worst fit
filling           sequences into slots, and best fit into packs with room
pricing           the strategies that are worth most at given prices, and their tables
nnls              non-negative least squares over priced strategies
linear_program    the cutting-stock program in HiGHS
"""

//! The server against clients that keep the protocol, break it, or mean harm.

mod backup;
mod fairness;
mod faults;
mod handover;
mod headroom;
mod lending;
mod limits;
mod metrics;
mod misbehaviour;
mod mistakes;
mod model;
mod named;
mod neighbours;
mod news;
mod own_range_model;
mod own_ranges;
mod parts;
mod raw;
mod requests;
mod restart;
mod sessions;
mod shape;
mod shared;
mod tiers;
mod working_sets;

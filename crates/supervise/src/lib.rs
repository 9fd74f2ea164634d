//! What the supervisor (`farmem run`) and the pagers of its process tree say to each other.
//!
//! * [`RunVariable`]: the one environment variable that a program inherits.
//! * [`PagerLink`] and [`Listener`]: the two ends of the control socket, a sequence of packets that
//!   each hold one message and its descriptors.
//! * [`StatsLayout`], [`StatsWriter`], [`StatsSnapshot`]: the page of counters that a pager
//!   shares; readable after the pager's death.
//! * [`Budget`]: how the local limit of a run is divided.
//! * [`SignalQueue`], [`start_program`] and [`children_usage`]: the few process services of the supervisor that the
//!   standard library has no safe call for.
//!
//! It decides nothing about a run: that is the binary's. Pages never pass through here.

mod budget;
mod link;
mod message;
mod packet;
mod process;
mod run_variable;
mod stats;

pub use budget::{Budget, Use};
pub use link::{LinkError, Listener, Met, PagerLink, PagerPeer, Received, tell_unpaged};
pub use message::{
    Hello, Offer, PROTOCOL_VERSION, PagerMessage, SessionReport, SupervisorMessage, Welcome,
};
pub use packet::{DESCRIPTORS_MAX, PACKET_BYTES_MAX};
pub use process::{ChildrenUsage, QueuedSignal, SignalQueue, children_usage, start_program};
pub use run_variable::{RUN_VARIABLE, RunVariable, RunVariableError};
pub use stats::{
    Counter, Histogram, HistogramSnapshot, StatsError, StatsLayout, StatsSnapshot, StatsWriter,
};

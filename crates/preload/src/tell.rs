//! What this library says, and to whom: to the supervisor, through its control socket, that a
//! program goes on unpaged; to standard error only that FARMEM_RUN itself cannot be read, because
//! there is then no supervisor to tell, and somebody set it by hand.

use core::fmt::Write;

use crate::kernel::{self, Errno, ProcessId};
use crate::settings::settings;
use crate::text::Text;

/// What could not be done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failure {
    /// The step, as it reads after "cannot".
    pub(crate) step: &'static str,
    /// The kernel's reason.
    pub(crate) errno: Errno,
}

impl Failure {
    /// For `map_err`: the step that failed with an error number.
    pub(crate) fn at(step: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self { step, errno }
    }
}

/// The packet has a fixed text, two numbers and one step, all far below this.
const PACKET_BYTES: usize = 512;

/// Tells the supervisor that nothing will hold `program` to its limit, and why. If it cannot be
/// told either, the program still runs as it would have without farmem.
pub(crate) fn unpaged(program: ProcessId, failure: Failure) {
    let Failure {
        step,
        errno: Errno(number),
    } = failure;
    let mut packet = Text::<PACKET_BYTES>::new();
    let written = write!(
        packet,
        r#"{{"type":"unpaged","program_pid":{program},"message":"cannot {step} (error {number})"}}"#
    );
    if written.is_ok() {
        let _ = kernel::send_packet(settings().socket.as_bytes(), packet.as_bytes());
    }
}

/// One line on standard error: FARMEM_RUN is malformed.
pub(crate) fn complain(fault: &str) {
    const STANDARD_ERROR: kernel::Descriptor = 2;
    let mut line = Text::<PACKET_BYTES>::new();
    let written = writeln!(
        line,
        "farmem: FARMEM_RUN cannot be used: {fault}; this program is not paged. \
         Unset it, or start the program by `farmem run`."
    );
    if written.is_ok() {
        kernel::write(STANDARD_ERROR, line.as_bytes());
    }
}

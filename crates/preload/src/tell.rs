//! What this library says, and to whom: to the supervisor, through its control socket, that a
//! program goes on unpaged; to standard error only that FARMEM_RUN itself cannot be read, because
//! there is then no supervisor to tell, and somebody set it by hand.

use core::fmt::Write;

use crate::kernel::{self, Errno, ProcessId};
use crate::settings::settings;
use crate::text::Text;

/// Whether the supervisor still listens.
pub(crate) fn supervisor_lives() -> bool {
    // SAFETY: closed at once.
    let connected = unsafe { kernel::connect(settings().socket.as_bytes()) };
    if let Ok(supervisor) = connected {
        // SAFETY: connected above, used by nobody else.
        unsafe { kernel::close(supervisor) };
    }
    connected.is_ok()
}

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
    let Failure { step, errno: Errno(number) } = failure;
    unpaged_as(program, format_args!("cannot {step} (error {number})"));
}

/// The same for a reason that is no failure. It must hold nothing that JSON writes otherwise.
pub(crate) fn unpaged_as(program: ProcessId, reason: core::fmt::Arguments<'_>) {
    let mut packet = Text::<PACKET_BYTES>::new();
    let written =
        write!(packet, r#"{{"type":"unpaged","program_pid":{program},"message":"{reason}"}}"#);
    // SAFETY: closed below.
    let connected = unsafe { kernel::connect(settings().socket.as_bytes()) };
    if let (Ok(()), Ok(supervisor)) = (written, connected) {
        kernel::send(supervisor, packet.as_bytes());
        // SAFETY: connected above, used by nobody else.
        unsafe { kernel::close(supervisor) };
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

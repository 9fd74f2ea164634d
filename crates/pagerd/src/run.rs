//! The life of the pager.

use rustix::event::{PollFd, PollFlags, poll};

use crate::runtime::Arguments;

/// Serves the program until it ends.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the pager proper will keep them"
)]
pub(crate) fn run(arguments: Arguments) -> ! {
    let Arguments {
        program_pidfd,
        supervisor_pidfd,
        ..
    } = arguments;
    let mut ends =
        [program_pidfd, supervisor_pidfd].map(|end| PollFd::from_borrowed_fd(end, PollFlags::IN));
    let _ = poll(&mut ends, None);
    std::process::exit(0)
}

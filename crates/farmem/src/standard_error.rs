//! Standard error, for those who must not wait for whoever reads it: a supervisor, or a server that
//! programs wait for.
//!
//! It is what the user's shell, a service manager or another program has made of it: a pipe that nobody
//! reads any more, or that is full, for ever or for a while, blocking or not.

use std::fmt;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};

/// A reader that takes nothing for so long does not get the text.
const PATIENCE: Duration = Duration::from_millis(100);

/// Whether the last text was taken. While none is, nobody waits any more. A process has one standard error.
static IS_TAKEN: AtomicBool = AtomicBool::new(true);

/// Writes one line of farmem's.
pub(crate) fn tell(line: impl fmt::Display) {
    write(&format!("farmem: {line}\n"));
}

/// Writes a text. What nobody takes within [`PATIENCE`] is dropped, and so is what cannot be written.
pub(crate) fn write(text: &str) {
    let patience = if IS_TAKEN.load(Ordering::Relaxed) { PATIENCE } else { Duration::ZERO };
    let stderr = std::io::stderr();
    let written = write_within(stderr.as_fd(), text.as_bytes(), patience);
    IS_TAKEN.store(written.is_ok(), Ordering::Relaxed);
}

fn write_within(file: BorrowedFd<'_>, mut bytes: &[u8], patience: Duration) -> Result<(), Errno> {
    let until = Instant::now() + patience;
    while !bytes.is_empty() {
        match write_at_once(file, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let left = until.saturating_duration_since(Instant::now());
                await_room(file, left)?;
                if left.is_zero() {
                    // Who says that there is room, and takes nothing, is not asked for ever.
                    return Err(Errno::AGAIN);
                }
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Writes what there is room for: others write there too, so that a look beforehand says nothing where
/// they can fill it (pipes and sockets).
fn write_at_once(file: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, Errno> {
    const WHERE_IT_IS: u64 = u64::MAX;
    if is_regular(file) {
        // It waits for no reader, and some file systems refuse to write at once for other reasons.
        return rustix::io::write(file, bytes);
    }
    match pwritev2(file, &[IoSlice::new(bytes)], WHERE_IT_IS, ReadWriteFlags::NOWAIT) {
        // Terminals do not know it.
        Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
            await_room(file, Duration::ZERO)?;
            rustix::io::write(file, bytes)
        }
        written => written,
    }
}

fn is_regular(file: BorrowedFd<'_>) -> bool {
    use rustix::fs::{FileType, fstat};
    fstat(file).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
}

/// `AGAIN` if there is none in time.
fn await_room(file: BorrowedFd<'_>, patience: Duration) -> Result<(), Errno> {
    let timeout = Timespec::try_from(patience).map_err(|_| Errno::INVAL)?;
    match poll(&mut [PollFd::new(&file, PollFlags::OUT)], Some(&timeout)) {
        Ok(0) => Err(Errno::AGAIN),
        // Also if nobody reads there any more: writing tells.
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    const SHORT: Duration = Duration::from_millis(10);

    #[test]
    fn nobody_waits_for_a_reader_and_what_fits_arrives() {
        for flags in [PipeFlags::CLOEXEC, PipeFlags::CLOEXEC | PipeFlags::NONBLOCK] {
            let (reader, writer) = pipe_with(flags).unwrap();
            write_within(writer.as_fd(), b"read me\n", SHORT).unwrap();
            let more_than_it_holds = vec![b'.'; 2 << 20];
            let full = write_within(writer.as_fd(), &more_than_it_holds, SHORT);
            assert_eq!(full, Err(Errno::AGAIN));
            assert_eq!(write_within(writer.as_fd(), b"lost", Duration::ZERO), Err(Errno::AGAIN));
            let mut start = [0; 8];
            std::fs::File::from(reader).read_exact(&mut start).unwrap();
            assert_eq!(&start, b"read me\n");
            // Its reader is closed now.
            assert_eq!(write_within(writer.as_fd(), b"nobody", SHORT), Err(Errno::PIPE));
        }
    }

    #[test]
    fn files_take_all_of_it() {
        let mut file = tempfile::tempfile().unwrap();
        write_within(file.as_fd(), b"one\n", SHORT).unwrap();
        write_within(file.as_fd(), b"two\n", SHORT).unwrap();
        let mut text = String::new();
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "one\ntwo\n");
    }
}

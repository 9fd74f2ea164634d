//! What a protocol has to say to the loop that drives it.

use std::collections::VecDeque;
use std::ops::Range;

use crate::content::Pages;

/// A part of the replies, at their front.
pub(crate) struct Part {
    /// Bytes that it takes.
    pub(crate) bytes: usize,
    /// Which of them are a page, the next one of those expected.
    pub(crate) page: Option<Range<usize>>,
    /// Whether a reply ends with it.
    pub(crate) ends: bool,
}

/// A protocol in which pages are stored and asked for. Replies come in the order of requests.
pub(crate) trait Protocol {
    /// Appends a request that stores a page.
    fn store(&mut self, page: u64, pages: &Pages, out: &mut Vec<u8>);

    /// Appends a request for pages.
    fn ask(&mut self, wanted: &[u64], out: &mut Vec<u8>);

    /// Looks at what has come; `None` if the next part is not complete. `expected` are the pages
    /// that are still to come.
    ///
    /// # Errors
    /// It is not what was asked for.
    fn take(&mut self, bytes: &[u8], expected: &VecDeque<u64>) -> anyhow::Result<Option<Part>>;
}

impl Part {
    /// Bytes that are no page.
    pub(crate) const fn of(bytes: usize, ends: bool) -> Self {
        Self { bytes, page: None, ends }
    }
}

/// A line without its end, which is `\r\n`, if it is complete.
pub(crate) fn line(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    Some(bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end]))
}

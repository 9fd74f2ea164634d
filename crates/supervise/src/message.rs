//! The messages of the control socket, as JSON: they are few, and a person can read them in a
//! trace. Both ends come from one build; the version is checked all the same, because a daemon
//! may outlive an upgrade.

use serde::{Deserialize, Serialize};

/// The version of these messages. Both sides must have the same one.
///
/// * 1: the first.
/// * 2: children are handed over from pager to pager.
/// * 3: a pager is told the most that its share can become.
pub const PROTOCOL_VERSION: u32 = 3;

/// From a pager to its supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum PagerMessage {
    /// The first message; carries the descriptor of the pager's stats page.
    Hello(Hello),
    /// The only message of a preload library that could not watch its program, which therefore
    /// goes on without a pager. Written there by hand: the form is part of the version.
    Unpaged {
        /// The process that goes on.
        program_pid: u32,
        /// For a person.
        message: String,
    },
    /// What the pager has left in the program's memory, where forked children have a copy of it: so
    /// it can be told who has inherited pages from this program. Comes before [`Self::Armed`].
    Marked {
        /// The address.
        place: u64,
        /// What is found there.
        secret: u64,
    },
    /// Pages may leave the program from now on. Carries the main and the scratch userfaultfd, which
    /// the supervisor holds until the program has ended: while any duplicate is open a fault
    /// waits, and the kernel never hands out zero pages.
    Armed,
    /// The session that the pager opened, so that the supervisor can end it should the pager not.
    Session(SessionReport),
    /// The program forked. Carries the child's userfaultfd, held until [`Self::ForkChildGone`] with
    /// the same `key` or until the run has ended.
    ForkChild {
        /// Chosen by the pager.
        key: u64,
    },
    /// The child's pages are all where they belong, or the child has ended.
    ForkChildGone {
        /// The key of the [`Self::ForkChild`].
        key: u64,
    },
    /// Which of the offered children the pager's program is; once all have been offered.
    Recognised {
        /// The offer; `None` if it was none of them.
        offer: Option<Offer>,
    },
    /// The pager cannot take its program over after all, and begins with nothing.
    Declined,
    /// The child is handed over: carries a file with all that is known of its memory. It is neither
    /// heard nor answered until [`SupervisorMessage::Taken`] or [`SupervisorMessage::Returned`].
    HandedOver {
        /// The key of the [`Self::ForkChild`].
        key: u64,
    },
    /// The child cannot be handed over.
    Kept {
        /// The key of the [`Self::ForkChild`].
        key: u64,
    },
    /// The pager cannot go on: the supervisor stops the program and says why.
    Fatal {
        /// For a person: what was lost and where.
        message: String,
        /// What `farmem run` exits with.
        exit_code: u8,
    },
    /// The pager has ended its session and leaves; its program needs it no more.
    Bye,
}

/// A forked child that is served by its parent's pager, and may be that of another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The pager that serves it, as the supervisor numbers them.
    pub pager: u64,
    /// The key of the [`PagerMessage::ForkChild`].
    pub key: u64,
}

/// Who a pager is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`].
    pub version: u32,
    /// The process whose memory it pages.
    pub program_pid: u32,
    /// The pager itself.
    pub pager_pid: u32,
    /// The program's name, for people.
    pub name: String,
}

/// A session on a memory server, with all that ending it from outside takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionReport {
    /// The server's address as the supervisor gave it.
    pub server: String,
    /// The session's number.
    pub session: u64,
    /// The session's secret.
    pub token: u64,
    /// The epoch of the region.
    pub epoch: u64,
    /// The server's incarnation.
    pub incarnation: u64,
    /// The region.
    pub region: u64,
    /// Bytes that the server has granted.
    pub granted: u64,
}

/// From the supervisor to a pager.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum SupervisorMessage {
    /// The answer to a hello.
    Welcome(Welcome),
    /// The answer to a hello that the supervisor cannot serve. The program goes on unpaged.
    Refuse {
        /// For a person.
        message: String,
    },
    /// The program's share of the local limit from now on.
    Limit {
        /// Bytes, the pager's own memory included.
        bytes: u64,
    },
    /// Before the welcome, to a pager whose program was forked from a paged one: the userfaultfd of
    /// a child. It may be that of this program.
    Offered(Offer),
    /// No more offers: which was it?
    AllOffered,
    /// A child has a pager of its own that will take it over.
    HandOver {
        /// The key of the [`PagerMessage::ForkChild`].
        key: u64,
        /// The child.
        program_pid: u32,
    },
    /// It has been taken over.
    Taken {
        /// The key of the [`PagerMessage::ForkChild`].
        key: u64,
    },
    /// It has not, and is to be served as before.
    Returned {
        /// The key of the [`PagerMessage::ForkChild`].
        key: u64,
    },
}

/// What a pager works with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The program's share of the local limit: bytes, the pager's own memory included.
    pub limit_bytes: u64,
    /// The most that its share can become: the limit of the run.
    pub limit_bytes_max: u64,
    /// The memory server: `number:port` or `unix:PATH`, with no name left to resolve.
    pub server: String,
    /// Where pages go that the server has no room for.
    pub spill: Option<String>,
    /// What to ask of the server at setup; more is asked for as the region grows.
    pub reservation_bytes: u64,
    /// Whether the server's arena may be mapped: it is on this machine and belongs to this user.
    pub share_arena: bool,
    /// The longest run that read-ahead fetches.
    pub readahead_pages_max: u32,
    /// A process with so much memory gets a pager.
    pub pager_mark_bytes: u64,
    /// The session of the parent's pager, if the program is taken over from it. Carries the file of
    /// [`PagerMessage::HandedOver`].
    pub taken_from: Option<SessionReport>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_preload_library_writes_by_hand_is_understood() {
        let text = r#"{"type":"unpaged","program_pid":7,"message":"cannot map (error 12)"}"#;
        let message: PagerMessage = serde_json::from_str(text).unwrap();
        let expected = "cannot map (error 12)".to_owned();
        assert_eq!(message, PagerMessage::Unpaged { program_pid: 7, message: expected });
    }
}

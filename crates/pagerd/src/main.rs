//! Placeholder.
fn main() { println!("hi {:?}", std::thread::current().id()); }

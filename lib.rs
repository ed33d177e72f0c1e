//! Pavage.

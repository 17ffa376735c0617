//go:build tools

// Package tools names what testdata/cluster builds, so that go.mod and go.sum hold exactly what this needs.
package tools

import _ "go.etcd.io/etcd/server/v3"

//go:build tools

// Package tools names what testdata/cluster builds, so that go.mod and go.sum hold exactly what these need.
package tools

import (
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kube-proxy"
	_ "k8s.io/kubernetes/cmd/kubectl"
)

{{/*
The pod template of one group. Takes a dict: root, name (of the container), component, group (the group's values),
hasApi (whether it talks to Kubernetes), isHead.
*/}}
{{- define "moesaic.pod" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
{{- $group := .group -}}
{{- $grpcPort := (include "moesaic.sizes" $root | fromYaml).grpcPort | int -}}
metadata:
  labels:
    {{- include "moesaic.selectorLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
  {{- with $group.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  automountServiceAccountToken: {{ .hasApi }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ $values.terminationGracePeriodSeconds }}
  securityContext:
    {{- toYaml $values.podSecurityContext | nindent 4 }}
  {{- with $group.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .name }}
      image: {{ include "moesaic.image" $root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        {{- toYaml $values.securityContext | nindent 8 }}
      ports:
        {{- if .isHead }}
        - name: gcs-server
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
        - name: client
          containerPort: 10001
        {{- end }}
        - name: metrics
          containerPort: 8080
        {{- /* KubeRay puts every port of the head named `serve` or `serve-*` on the service. */}}
        - name: serve
          containerPort: 8000
        {{- if $grpcPort }}
        - name: serve-grpc
          containerPort: {{ $grpcPort }}
        {{- end }}
      env:
        {{- include "moesaic.env" $root | trim | nindent 8 }}
      resources:
        {{- toYaml $group.resources | nindent 8 }}
      {{- with $group.livenessProbe }}
      livenessProbe:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $group.readinessProbe }}
      readinessProbe:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        {{- if $values.modelVolume.existingClaim }}
        - name: models
          mountPath: {{ $values.modelVolume.mountPath }}
          readOnly: true
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    {{- if $values.modelVolume.existingClaim }}
    - name: models
      persistentVolumeClaim:
        claimName: {{ $values.modelVolume.existingClaim }}
        readOnly: true
    {{- end }}
{{- end -}}

{{/* The API key, where the configuration reads it. */}}
{{- define "moesaic.keyEnv" -}}
{{- include "moesaic.secretEnv" (dict "name" "MOESAIC__FRONTEND__API_KEY" "from" .Values.apiKey) -}}
{{- end -}}

{{/* Secrets reach the configuration by its environment variables, never as arguments. */}}
{{- define "moesaic.env" -}}
{{- include "moesaic.keyEnv" . }}
{{- include "moesaic.secretEnv" (dict "name" "MOESAIC__FRONTEND__OPERATOR_KEY" "from" .Values.operatorKey) }}
{{- include "moesaic.secretEnv" (dict "name" "MOESAIC__REDIS__URL" "from" .Values.redis) }}
{{- include "moesaic.secretEnv" (dict "name" "HF_TOKEN" "from" .Values.hfToken) }}
{{- /* Ray's own priority for its processes lets every other program preempt the engine. */}}
- name: RAY_worker_niceness
  value: "0"
{{- /* Workers outlive a head that is being replaced. */}}
- name: RAY_gcs_rpc_server_reconnect_timeout_s
  value: "600"
{{- /* So often workers tell Serve what is asked of them, for config.attention.max_workers. */}}
- name: RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S
  value: "2"
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* One variable from a secret, if there is one. Takes a dict: name, from (existingSecret, key). */}}
{{- define "moesaic.secretEnv" -}}
{{- if .from.existingSecret }}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .from.existingSecret }}
      key: {{ .from.key }}
{{- end }}
{{- end -}}
